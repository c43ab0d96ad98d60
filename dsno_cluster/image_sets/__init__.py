"""Sets of images at an address: sample shards, pictures, arrays; read by index, in any process."""
