"""Linux guests: reading kernels, and where everything lies when one starts."""
