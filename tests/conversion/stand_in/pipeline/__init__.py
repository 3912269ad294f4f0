raise ImportError("the recorder has no use for what this package imports")
