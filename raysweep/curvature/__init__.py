"""Curvature of language-model losses: numerics on tensors that know no stage, file or cluster."""
