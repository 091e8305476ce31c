"""Text: tokenizers, documents, and rows of tokens with the tokens that follow them."""
