"""From webdataset tars to batches: index finds members, order deals ids, shards reads, loader joins."""
