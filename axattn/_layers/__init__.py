"""What the Linen and the NNX layers share: plain functions of arrays and options, without Flax."""
