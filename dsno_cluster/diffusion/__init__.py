"""The mathematics of diffusion: schedules, time grids, solvers, noise. Pure functions."""
