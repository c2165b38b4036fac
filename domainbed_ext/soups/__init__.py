"""Soups: means of the weights of finished runs (Wortsman et al. 2022; DiWA, Rame et al. 2022), as derived runs."""
