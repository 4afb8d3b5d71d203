"""The networks: discrete VAE (stage 1) and prior (stage 2). Nothing here knows about data files or DeepSpeed."""
