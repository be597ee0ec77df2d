"""Models on the Hub: card, layout, push."""
