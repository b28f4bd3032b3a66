"""How a machine's memory is protected: what answers a conversion."""
