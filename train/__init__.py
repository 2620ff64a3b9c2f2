"""Training. Nothing is here yet: the sharded loop, its objectives and recipes will be."""
