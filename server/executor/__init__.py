"""What runs on the device, behind one seam."""
