"""Whether a call fits: asked before anything is launched or written, without reading a tensor."""
