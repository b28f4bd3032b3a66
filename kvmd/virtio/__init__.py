"""Virtio 1.2 devices: queues, the MMIO transport, and block, network, entropy, console and balloon devices."""
