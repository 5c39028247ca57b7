"""Text as token ids, in the one coding of all tasks, programs and saved models of bytes.

Each byte is its own id, 0 to 255; padding is 256; the mask, which hides bytes from masked language models, is 257.
"""

BYTES = 256
"""Ids below are bytes."""
PAD_TOKEN_ID, MASK_TOKEN_ID = BYTES, BYTES + 1
UNMASKED_VOCABULARY, MASKED_VOCABULARY = BYTES + 1, BYTES + 2
