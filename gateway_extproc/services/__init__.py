"""What Envoy calls: each service as callbacks over bytes, whichever listener carries them."""
