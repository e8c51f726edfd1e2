"""Assign records to optimizer steps, balance them across ranks, and pack them into rows."""
