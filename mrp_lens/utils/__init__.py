"""What every room uses: validation, atomic files, the store of results, torch's switches."""
