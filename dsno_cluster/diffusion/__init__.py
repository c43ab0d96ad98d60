"""Diffusion mathematics: noise schedule, ODE solvers, teachers."""
