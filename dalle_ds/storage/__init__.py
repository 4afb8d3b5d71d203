"""What lies on the disk: durable files, pieces of parameters, and the folders of checkpoints."""
