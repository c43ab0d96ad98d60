"""Where things run: Ray pools and submitit. Nothing here looks at tensors."""
