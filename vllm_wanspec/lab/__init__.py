"""Measuring: what remote drafting costs and brings, beside the alternatives."""
