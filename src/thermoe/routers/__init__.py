"""Routers: tensors in, a `RoutingDecision` out. A router never reads hardware and never waits for the device."""
