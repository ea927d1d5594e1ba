"""Mixture of experts: routing, dispatch of tokens to experts, and the expert layers."""
