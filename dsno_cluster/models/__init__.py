"""Networks: the U-Net, its temporal convolutions, and the student made of both."""
