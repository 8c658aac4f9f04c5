"""One runnable study per question, built only from mrp_lens."""
