"""Training: `engine` trains image networks, `adapters` language and vision-language models; both go on after a kill (`resume`).

What may be hung into the engine from outside is in `hook`, what the precision `auto` means in `precision`.
"""
