"""The demonstration: two characters are learned, drawn, merged and judged, and a page shows the result."""
