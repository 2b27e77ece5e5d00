"""What general-purpose compressors reach on held-out text: the yardstick beside a small model's bits per byte."""

import gzip
import lzma


def bits_per_byte(train: bytes, held_out: bytes) -> dict[str, float]:
    """Compressed size of `held_out` in bits per byte, by compressor.

    Args:
      train: training text, with which the last compressor is primed.
      held_out: the text to compress, not empty.

    Returns:
      'gzip -9'; 'xz -9'; and 'xz -9, primed': what the held-out text adds to the compressed training text, whose whole
      is in xz's dictionary of 64 MiB. (gzip sees 32 KiB back; priming it would change nothing.)
    """
    alone = len(lzma.compress(held_out, preset=9))
    both = len(lzma.compress(train + held_out, preset=9)) - len(lzma.compress(train, preset=9))
    sizes = {"gzip -9": len(gzip.compress(held_out, 9)), "xz -9": alone, "xz -9, primed": both}
    return {name: 8 * size / len(held_out) for name, size in sizes.items()}
