"""What a training would cost: parameters, FLOPs, memory, network, hours, from shapes alone."""
