"""Recurrent networks that begin anew for each token."""
