"""The kernel's KVM API: the only folder that does ioctls."""
