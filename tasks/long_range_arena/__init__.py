"""The Long Range Arena (Tay et al. 2020, arXiv:2011.04006) and Speech Commands as labelled seqio tasks.

    lra_listops                   nested list operations, 10 classes; generated (`listops`)
    lra_pathfinder, lra_pathx     are two circles connected? 32 x 32 and 128 x 128 pixels; generated (`pathfinder`)
    lra_text                      sentiment of IMDb reviews, as bytes
    lra_retrieval                 does a paper cite the other? pairs of texts, as bytes
    lra_image                     CIFAR-10 in grey, as pixels
    speech_commands               35 spoken words, as 16,000 samples

`registered` registers them; importing it reads no file and generates nothing. What is generated is a function of the seed, the
split and the number of the example, and is kept in the token cache; the rest is read from where `tasks.corpora.settings` says
(`local`).
"""
