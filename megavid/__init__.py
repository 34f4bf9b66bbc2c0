"""megavid: training of video diffusion transformers, in tensor, pipeline, context and expert parallel.

Shape legend, one for the whole project. Capitals are logical sizes, lower case is the local shard
(``e`` = E / ep, ``t`` = T / tp or cp):

B  packs in a microbatch            C  latent channels            F  latent frames
H  latent height                    W  latent width               T  video tokens of a pack
L  text or image tokens of a clip   D  model width                N  attention heads
A  width of one head                E  experts                    K  experts a token goes to (top-k)
R  rows of the timestep table       M  hidden width of an FFN     P  numbers in one patch (C x patch volume)
G  clips of a microbatch            S  slots: (token, expert) pairs after routing
Q  noise buckets of the statistics  I  input width of a matrix  O  output width of a matrix

Tensors whose shape is the point carry it as a suffix: ``clean_BTP``, ``x_tBD``, ``counts_QE``.
"""

__version__ = "0.1.0"
