"""Systems of pictures: what connects them with words, and what draws them."""
