"""The frozen vision foundation models behind one contract."""
