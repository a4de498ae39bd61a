"""What both sides must agree on: tensors, programs, state, channels, errors."""

from __future__ import annotations

import os

# gRPC's own handlers at a fork now and then crash the child where threads are at work in gRPC, as they are while
# training: a DataLoader's workers are such children, and have no use for gRPC. It reads this when it starts.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
