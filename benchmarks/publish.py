"""A result goes to the screen, and to a file with its tables beside it."""

import json
from pathlib import Path
from typing import Any


def publish(result: dict[str, Any], markdown: str, output: Path | None) -> None:
    """Print the tables and, as the last line, the JSON; write both if there is a .json to write."""
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=2) + "\n")
        output.with_suffix(".md").write_text(markdown)
    print(markdown)
    print(json.dumps(result))
