"""The frame of all models of the family: an embedding → a stack of blocks → a reading."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import flax.linen as nn
from jax import Array

from crate_jax import placement
from crate_jax.models.block import Block, Context, Dropout, Part, chosen_taps, stack, tap_names
from crate_jax.models.fields import ModelFields
from crate_jax.models.modulation import PerLayer
from crate_jax.options import option_of


class BlockModel(ModelFields, nn.Module):
    """A stack of blocks; each kind of model adds its input and its reading.

    A model is a subclass with the fields of its family (`crate_jax.models.fields`) that gives
    `attention_part` and `nonlinearity_part`, and overrides what differs of `block_fields`,
    `drop_path_rates` and `per_layer`. A kind of model, such as the image classifier, gives the
    properties and methods of this class that raise TypeError here. Parameters are float32; the
    computation is in ``dtype``, with norms, softmax and logits in float32. Layers are stacked on
    axis 0 of every leaf under ``blocks``; one set of parameters for all is under ``block``.
    """

    EPSILON: ClassVar[float] = 1e-5  # of the LayerNorms
    SHARED: ClassVar[bool] = False  # whether all layers have one set of parameters
    # Groups of parameters that a model goes without where a field is 0, by the field.
    OPTIONAL: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    # Groups of parameters that no example meets: devices add up the gradients behind them alone.
    WITHOUT_EXAMPLES: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **options: Any) -> None:
        """Mark a subclass's helpers as the helpers of its bases are marked.

        Flax would record what they return, modules among it, under ``capture_intermediates``.
        """
        for name, method in vars(cls).items():
            if hasattr(getattr(super(cls, cls), name, None), "nowrap"):
                nn.nowrap(method)
        super().__init_subclass__(**options)

    @property
    def attention_part(self) -> Part:
        """The first half of a block."""
        raise TypeError("a model must say what its attention is")

    @property
    def nonlinearity_part(self) -> Part | None:
        """The second half of a block."""
        raise TypeError("a model must say what its nonlinearity is")

    @property
    def num_tokens(self) -> int:
        """N, the tokens of one example in a block."""
        raise TypeError("a kind of model must say how many tokens it has")

    @property
    def embedding_products(self) -> int:
        """Multiply-adds of the embedding's matrix products, for one example."""
        raise TypeError("a kind of model must say what its embedding costs")

    @property
    def first_products(self) -> int:
        """Multiply-adds of the embedding whose input needs no gradient: nothing trains it."""
        return 0

    @property
    def head_products(self) -> int:
        """Multiply-adds of the head's matrix products, for one example."""
        raise TypeError("a kind of model must say what its head costs")

    @property
    def head_again(self) -> int:
        """Multiply-adds of the head that the backward pass computes again, by ``remat``."""
        return 0

    @property
    def kept_outside(self) -> int:
        """Values that the backward pass keeps outside the layers, for one example.

        Those of a linear embedding and a linear head are few, and left out.
        """
        return 0

    @nn.nowrap
    def sample_input(self) -> Array:
        """One blank example, (1, …), as a call takes it; `init` needs it."""
        raise TypeError("a kind of model must say what it takes")

    @nn.nowrap
    def block_fields(self) -> dict[str, Any]:
        """Fields of `Block` that are not its defaults."""
        return {}

    @nn.nowrap
    def drop_path_rates(self) -> Array | None:
        """The rate of stochastic depth of every layer (L,); None: no half is ever skipped."""
        return None

    @nn.nowrap
    def check_fields(self) -> None:
        """Refuse fields that do not go together.

        Raises:
            ValueError: some do not.
        """

    @nn.nowrap
    def shared_context(self) -> Context:
        """The arguments that all blocks share besides the tokens, with parameters of the model."""
        return Context()

    @nn.nowrap
    def per_layer(self) -> PerLayer:
        """The arguments that differ by depth. A model may make them of parameters of its own."""
        return PerLayer(self.drop_path_rates())

    @property
    def layers_at_once(self) -> int:
        """Layers per iteration of the compiled loop.

        A loop copies what each layer keeps in and out of one array for all: on an H100 that is a
        third of a training step of CRATE-B, and compiling all layers takes some seconds longer.
        With remat memory comes first, and a loop is certain to forget what is computed again.
        """
        if self.scan_unroll is not None:
            return self.scan_unroll
        return self.depth if placement.platform() == "gpu" and self.remat == "none" else 1

    @property
    def subspace_dim(self) -> int:
        """p, the dimension of a subspace.

        Raises:
            ValueError: head_dim is not set and width is not a multiple of num_heads.
        """
        if self.head_dim is not None:
            return self.head_dim
        if self.width % self.num_heads:
            raise ValueError(
                "model.width must be a multiple of model.num_heads when model.head_dim is not set; "
                f"got {self.width} and {self.num_heads}. Set model.head_dim."
            )
        return self.width // self.num_heads

    @property
    def tap_names(self) -> tuple[str, ...]:
        """The names of the taps of the layers, in the order of computation."""
        return tap_names(self.attention_part, self.nonlinearity_part)

    @nn.compact
    def with_layers(self, compute: Callable[[], Any]) -> Any:
        """Call a function that makes layers. Flax allows only one method of a module to make them.

        Raises:
            ValueError: a field breaks a rule.
        """
        for field in dataclasses.fields(self):
            choices = option_of(field).choices if "option" in field.metadata else ()
            value = getattr(self, field.name)
            if choices and isinstance(value, str) and value not in choices:
                raise ValueError(
                    f"model.{field.name} must be one of {', '.join(choices)}; got {value}."
                )
        self.check_fields()
        kernel = getattr(self, "attention_kernel", "auto")
        if kernel in ("pallas", "cudnn") and (
            self.backward == "autodiff" or self.attention_part.name != "mssa"
        ):
            raise ValueError(
                "model.attention_kernel must be auto or xla without MSSA, and with "
                f"model.backward=autodiff; got {kernel}. Leave it unset."
            )
        return compute()

    @nn.nowrap
    def run_blocks(
        self,
        Z_BxNxd: Array,
        *,
        train: bool,
        taps: str | Iterable[str] = (),
        context: Context | None = None,
    ) -> tuple[Array, dict[str, Array]]:
        """Run embedded tokens through the stack. Call it within `with_layers`.

        Args:
            Z_BxNxd: tokens.
            train: whether dropout and stochastic depth act; they need a "dropout" key.
            taps: names out of `tap_names`, or one.
            context: what all blocks see besides the tokens; None: `shared_context`.

        Returns:
            Tokens (B, N, d) after the last block, and the taps with the layers on axis 0.

        Raises:
            KeyError: an unknown tap.
        """
        names = chosen_taps(taps, self.tap_names)
        Z_BxNxd = Dropout(self.dropout, train)(Z_BxNxd)
        blocks = stack(
            Block,
            self.depth,
            remat=self.remat,
            unroll=self.layers_at_once,
            shared=self.SHARED,
            name="block" if self.SHARED else "blocks",
            attention=self.attention_part,
            nonlinearity=self.nonlinearity_part,
            dtype=self.dtype,
            backward=self.backward,
            epsilon=self.EPSILON,
            dropout=self.dropout,
            train=train,
            taps=names,
            **self.block_fields(),
        )
        context = self.shared_context() if context is None else context
        return blocks(Z_BxNxd, self.per_layer(), context)
