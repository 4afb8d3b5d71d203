"""What a run looks like: captioned picture grids, curves as inline SVG, and one self-contained HTML page."""
