"""Mathematics and cryptography on tensors and bytes; knows no federation."""
