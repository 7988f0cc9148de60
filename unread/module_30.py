def function_30(x):
    return x + 30
def function_30(x):
    return x + 30
def function_30(x):
    return x + 30
def function_30(x):
    return x + 30
def function_30(x):
    return x + 30
