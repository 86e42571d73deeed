"""What this library costs beside its peers: each module's `run` measures both and returns rows."""
