"""Commands on a draft checkpoint: inspect, convert, init."""
