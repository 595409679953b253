raise ImportError("scoring should not need torch")
