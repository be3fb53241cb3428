"""The verifier lane: proofs about kernels, from their PTX."""
