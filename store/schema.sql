-- A feature store: one immutable DuckDB file, schema 5. Tables of older stores (2 to 4) are the same,
-- but for those at the end, which say since when they are there.
-- Token ids are integers; text is only in `vocabulary` and `document`. No index: tables are sorted,
-- and a feature's rows are a range of row ids (feature.first_row, feature.n_active).

-- What the store is about; each value is JSON. "schema", "kind", "d_sae" and "context" are always there.
CREATE TABLE meta (key VARCHAR NOT NULL, value VARCHAR NOT NULL);

-- The tokenizer's tokens. `text` is for reading; `bytes` is set only for a token that is no whole
-- UTF-8 text by itself, so that a window of tokens can be decoded together.
CREATE TABLE vocabulary (token_id INTEGER NOT NULL, text VARCHAR NOT NULL, bytes BLOB);

-- One row a packed token sequence; keep is false at position 0 and special tokens.
-- split: 0 train, 1 held out. Sorted by sequence.
CREATE TABLE sequence (
    sequence BIGINT NOT NULL,
    tokens INTEGER[] NOT NULL,
    document INTEGER[] NOT NULL,
    keep BOOLEAN[] NOT NULL,
    split TINYINT NOT NULL
);

CREATE TABLE document (
    document INTEGER NOT NULL, key VARCHAR NOT NULL, title VARCHAR NOT NULL, split TINYINT NOT NULL
);

-- Every activation above zero, twice. position = sequence * context + index in the sequence.
-- Sorted by feature, then activation from strong to weak, then position.
CREATE TABLE activation_by_feature (
    feature INTEGER NOT NULL, activation FLOAT NOT NULL, position BIGINT NOT NULL
);
-- Sorted by position, then feature.
CREATE TABLE activation_by_position (
    position BIGINT NOT NULL, feature INTEGER NOT NULL, activation FLOAT NOT NULL
);

-- One row a feature, dead ones too (n_active 0); columns added by the indexer follow.
-- density = n_active / kept positions; mean and std (population) are over active positions.
CREATE TABLE feature (
    feature INTEGER NOT NULL,
    first_row BIGINT NOT NULL,
    n_active BIGINT NOT NULL,
    density DOUBLE NOT NULL,
    mean DOUBLE NOT NULL,
    std DOUBLE NOT NULL,
    max FLOAT NOT NULL,
    n_documents BIGINT NOT NULL
);

-- 40 equal bins over (0, max], closed on the right: bin = ceil(40 * activation / max) - 1.
-- Empty bins have no row.
CREATE TABLE histogram (feature INTEGER NOT NULL, bin TINYINT NOT NULL, count BIGINT NOT NULL);

-- kind 'top': the strongest positions, at most one a sequence; interval is -1.
-- kind 'interval': random positions in five equal intervals of (0, max], 0 the weakest.
-- active_place, active_value: where, and how much, the feature is active in the whole sequence.
CREATE TABLE example (
    feature INTEGER NOT NULL,
    kind VARCHAR NOT NULL,
    interval TINYINT NOT NULL,
    rank SMALLINT NOT NULL,
    position BIGINT NOT NULL,
    activation FLOAT NOT NULL,
    token_id INTEGER NOT NULL,
    active_place INTEGER[] NOT NULL,
    active_value FLOAT[] NOT NULL
);

-- Direct effect of a feature's decoder on the logits; sign +1 raised, -1 lowered; rank 0 first.
CREATE TABLE logit (
    feature INTEGER NOT NULL,
    sign TINYINT NOT NULL,
    rank SMALLINT NOT NULL,
    token_id INTEGER NOT NULL,
    value FLOAT NOT NULL
);

-- Features with the nearest decoder directions.
CREATE TABLE neighbour (
    feature INTEGER NOT NULL, rank SMALLINT NOT NULL, other INTEGER NOT NULL, cosine FLOAT NOT NULL
);

-- Features that fire at the same positions more often than by chance, counted over all kept
-- positions, by correlation: Pearson's of the two firings (0 or 1 at each position).
-- together = positions at which both fire; share = together / this feature's positions;
-- pmi = ln(kept positions * together / (n_active of one * n_active of the other)), in nats.
CREATE TABLE coactivation (
    feature INTEGER NOT NULL,
    rank SMALLINT NOT NULL,
    other INTEGER NOT NULL,
    together BIGINT NOT NULL,
    share FLOAT NOT NULL,
    pmi FLOAT NOT NULL,
    correlation FLOAT NOT NULL
);

-- Since schema 3.

-- The tokens that a feature fires on most often, at most 20; rank 0 first.
-- count: positions; share = count / kept positions with this token; mean: of the activation there.
CREATE TABLE token_profile (
    feature INTEGER NOT NULL,
    rank SMALLINT NOT NULL,
    token_id INTEGER NOT NULL,
    count BIGINT NOT NULL,
    share FLOAT NOT NULL,
    mean FLOAT NOT NULL
);

-- Up to 32 equal bins of the index in a sequence: bin = index * number of bins / context, rounded
-- down. kept: kept positions of all sequences in it.
CREATE TABLE position_bin (bin TINYINT NOT NULL, first INTEGER NOT NULL, kept BIGINT NOT NULL);
-- How often a feature fires in each; bins without have no row.
CREATE TABLE position_profile (feature INTEGER NOT NULL, bin TINYINT NOT NULL, count BIGINT NOT NULL);

-- Small pictures (JPEG) of the documents of a vision model; a position is one of its feature map's.
CREATE TABLE picture (document INTEGER NOT NULL, image BLOB NOT NULL);

-- Since schema 4.

-- Direct effects of a feature's decoder on the logits of all tokens, in 40 equal bins from its
-- lowest effect to its highest; closed on the left, the last on both sides. One row a feature;
-- none in stores without effects on logits.
CREATE TABLE logit_histogram (
    feature INTEGER NOT NULL, low FLOAT NOT NULL, high FLOAT NOT NULL, counts INTEGER[] NOT NULL
);

-- The groups that a document is in, at most one of a kind: 'topic' as its record says, 'source' the
-- file, folder or data set that it comes from. No rows of a kind that has fewer than two groups.
CREATE TABLE document_group (
    document INTEGER NOT NULL, kind VARCHAR NOT NULL, name VARCHAR NOT NULL
);

-- Groups in whose documents a feature fires more often than by chance, at most 10; rank 0 first.
-- Of N documents with a group of this kind and a kept position, K are in this group, the feature
-- fires in n, and in `documents` of the group's; expected = n K / N. log_odds: of firing in and out
-- of the group, with 1/2 added to each of the four counts, in nats. q: Benjamini-Hochberg's, of the
-- one-sided hypergeometric test, over all live features and all groups; only q <= 0.05 is kept.
-- positions: in this group; share = positions / the feature's positions in these N documents;
-- expected_share = the same of all kept positions.
CREATE TABLE enrichment (
    feature INTEGER NOT NULL,
    rank SMALLINT NOT NULL,
    kind VARCHAR NOT NULL,
    name VARCHAR NOT NULL,
    documents BIGINT NOT NULL,
    expected DOUBLE NOT NULL,
    log_odds DOUBLE NOT NULL,
    q DOUBLE NOT NULL,
    positions BIGINT NOT NULL,
    share DOUBLE NOT NULL,
    expected_share DOUBLE NOT NULL
);

-- The layers of an SAE of several; layer counts them from 0. tokens: on which it was measured at
-- each (0: a crosscoder, of which nothing is measured). cosine_next: mean cosine of a token's
-- centred activations here and at the next layer; NULL at the last, and where it is not measured.
CREATE TABLE layer (
    layer SMALLINT NOT NULL, site VARCHAR NOT NULL, tokens BIGINT NOT NULL, cosine_next DOUBLE
);
-- What a feature does at each layer. count: tokens on which it fires there; amount: sum of its
-- activations; share = amount / that of all layers, P(layer | feature). Of a crosscoder: amount is
-- the norm of what the feature writes there, and count is NULL.
CREATE TABLE layer_profile (
    feature INTEGER NOT NULL,
    layer SMALLINT NOT NULL,
    count BIGINT,
    amount DOUBLE NOT NULL,
    share DOUBLE NOT NULL
);

-- Of an SAE at the outputs of attention heads (hook_z), the norm of what a feature writes to each;
-- share = norm / sum of the norms over heads.
CREATE TABLE head_norm (
    feature INTEGER NOT NULL, head SMALLINT NOT NULL, norm FLOAT NOT NULL, share FLOAT NOT NULL
);

-- Where each feature lies on the map of decoder directions: near ones are near. Empty where no map
-- was made.
CREATE TABLE map_point (feature INTEGER NOT NULL, x FLOAT NOT NULL, y FLOAT NOT NULL);

-- Since schema 5.

-- Effect of a feature on the next token that was measured (`saescope effects`): the mean change of
-- its log-probabilities, in nats, when the feature's decoder direction, times its mean activation, is
-- added where it is active. sign +1 raised, -1 lowered; rank 0 first. error: standard error of the
-- mean over positions, NULL of one position. Empty where nothing was measured. The table of features
-- then has columns output_score and confidence_change (arXiv 2505.20063, 2510.03659), measured_kl
-- (mean KL divergence of the next token, in nats), NULL of dead features, and measured_positions; the
-- fact "effects" has what random directions of the same lengths do.
CREATE TABLE measured_logit (
    feature INTEGER NOT NULL,
    sign TINYINT NOT NULL,
    rank SMALLINT NOT NULL,
    token_id INTEGER NOT NULL,
    value FLOAT NOT NULL,
    error FLOAT
);
