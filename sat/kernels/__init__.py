"""Speed: attention kernels, packed, frozen and quantised weights, compilation; applied to a built model."""
