"""From bytes to examples: reading, formats, rendering, packing."""
