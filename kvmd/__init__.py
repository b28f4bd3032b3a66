"""kvmd: shared/private memory conversion of KVM guests, observable and testable."""

__version__ = "0.1.0"
