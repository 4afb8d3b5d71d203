"""From captioned pictures to samples: sources, shards, filters, transforms, and the made data set of scenes."""
