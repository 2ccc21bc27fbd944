"""The paper's Tables 1 and 3 to 17 as printed: results, and the differences it derives."""
