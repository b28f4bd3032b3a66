"""The software CPU: x86-64 emulated by Unicorn, for hosts without a usable KVM."""
