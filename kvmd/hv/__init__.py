"""What every accelerator speaks: exits, registers and the vCPU's handle. Data and protocols only."""
